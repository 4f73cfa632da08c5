"""What was measured, side by side: result rows, the page, comparisons, baselines and pictures."""
