"""The down projection of a dense FFN solved in closed form from calibration text (ours; no part of the paper's method)."""
