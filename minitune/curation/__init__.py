"""What is wrong with data, and what to do about it: findings, cleaning, splits, synthetic rows."""
