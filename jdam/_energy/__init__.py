"""The energy: Gibbs averages over the patterns, the separations that define them and the searches
that find them."""
