from tests.robustness import batches, data, evaluating, models, operators, settings
AREAS = {"Operators": operators.CELLS, "Batches": batches.CELLS, "Models": models.CELLS, "S": settings.CELLS, "D": data.CELLS, "E": evaluating.CELLS}
CELLS = [cell for cells in AREAS.values() for cell in cells]
