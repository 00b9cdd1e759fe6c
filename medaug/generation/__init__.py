"""Generation: how many of which class from which reference, and making them, resumably."""
