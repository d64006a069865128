from tests.robustness import batches, models, operators
AREAS = {"Operators": operators.CELLS, "Batches": batches.CELLS, "Models": models.CELLS}
CELLS = [cell for cells in AREAS.values() for cell in cells]
