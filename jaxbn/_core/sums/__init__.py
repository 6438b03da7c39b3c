"""The sums over the elements of each feature, a file for each platform."""
