"""What ``weight-transfer doctor`` does: it examines backends, and measures them between two processes."""
