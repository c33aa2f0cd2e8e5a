"""ConMIM (arXiv 2205.09616): training, evaluation, figures."""
