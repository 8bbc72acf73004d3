"""Public data sets as they lie on disk -> `data.Sample`. Not needed to learn the method; needed to train on real images."""
