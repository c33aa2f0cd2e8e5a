"""Binary Sparsity Alignment: sparse binary codes for embeddings."""
