"""Count the parameters and multiply-adds of all networks for `senet models`.

`python scripts/network_sizes.py` writes src/senet/commands/networks.csv anew.
"""

import csv

from senet.commands.models import TABLE, natural_order
from senet.models import list_models
from senet.models.cost import count_multiply_adds, count_parameters, meta_model

if __name__ == "__main__":
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("name", "parameters", "multiply_adds", "input_size"))
        for name in sorted(list_models(), key=natural_order):
            model = meta_model(name)
            size = "×".join(map(str, model.input_size))
            rows.writerow((name, count_parameters(model), count_multiply_adds(model), size))
