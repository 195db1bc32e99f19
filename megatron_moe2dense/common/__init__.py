"""What every part shares: errors, configs, registries, output directories, records, logging. No torch."""
