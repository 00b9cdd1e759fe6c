"""Does training on the synthetic images help? Equal steps, real test images, intervals, a verdict in plain words."""
