"""What JAX lacks: batching, collectives, decompositions, checks. It knows no measures."""
