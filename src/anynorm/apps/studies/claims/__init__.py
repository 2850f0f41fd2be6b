"""The claims about batch normalization, one file each: claim, design, thresholds and arms."""
