"""`moe2dense plan`: what a layout costs in memory, messages and time, from the models' sizes alone."""
