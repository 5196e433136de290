"""What ``weight-transfer bench`` does: updates of models with the shapes of real ones, beside what bounds them."""
