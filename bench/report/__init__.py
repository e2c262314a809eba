"""What rows say: figures, ranks, marks, red flags, and the tables made of them."""
