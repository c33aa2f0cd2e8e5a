"""CoCoRD: contrastive consistent representation distillation."""
