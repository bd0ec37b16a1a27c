"""N-grams of tokens: hashes, counts, log-likelihood ratios, and what they predict."""
