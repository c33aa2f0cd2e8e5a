"""SimSiam (Chen & He, CVPR 2021): training, evaluation and figures."""
