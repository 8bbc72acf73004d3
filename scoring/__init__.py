"""Around the method: scores of the benchmarks' tables, published rows, the report page, and the models that some rewards ask."""
