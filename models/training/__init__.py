"""Training: a loop that can be interrupted, the texts it reads, and the figures its results are held against."""
