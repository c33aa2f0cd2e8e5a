"""Seq-VCR (Arefin et al., ICLR 2025): training, evaluation, tasks and figures."""
