"""CoCoRD: Contrastive Consistent Representation Distillation."""
