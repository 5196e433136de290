"""What ``weight-transfer doctor`` does: it examines backends; `weight_transfer.bench.pairs` measures them."""
