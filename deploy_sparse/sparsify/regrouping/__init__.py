"""The parts of regroup: the rule, the partition of rows, the choice of columns, the blocks of a layer, the report."""
