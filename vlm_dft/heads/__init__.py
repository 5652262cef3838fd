"""What ``vlm_dft.head`` computes with: projections onto the vocabulary, softmax tiles, dense and sparse gradients."""
