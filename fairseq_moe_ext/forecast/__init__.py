"""How much compute sparsity should save: published scaling laws, and a law fitted to a study."""
