"""Around the method: benchmark scores, published results, held-out rewards, report page, plots,
and the frozen models that some rewards use."""
