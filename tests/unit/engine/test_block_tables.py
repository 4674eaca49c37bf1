from __future__ import annotations

import torch

from serve_app.engine.block_tables import BlockTables


def test_a_decode_step_adds_its_own_block_before_the_tables_are_read():
    tables = BlockTables(num_slots=3, width=4, block_size=16, device=torch.device("cpu"))
    tables.load(0, torch.tensor([7, 8]))
    tables.load(2, torch.tensor([5]))
    # slot 2 writes its 17th token to block 9; slot 0 its 20th to the block that it has
    slots, positions = torch.tensor([2, 0]), torch.tensor([16, 19])
    mapping = torch.tensor([9 * 16, 8 * 16 + 3])
    assert tables.extend(slots, positions, mapping, width=3).tolist() == [[5, 9, 0], [7, 8, 0]]


def test_a_new_holder_of_a_slot_starts_with_its_own_blocks():
    tables = BlockTables(num_slots=2, width=3, block_size=16, device=torch.device("cpu"))
    tables.load(0, torch.tensor([1, 2, 3]))
    tables.load(0, torch.tensor([4]))
    read = tables.extend(torch.tensor([0]), torch.tensor([16]), torch.tensor([6 * 16]), width=2)
    assert read.tolist() == [[4, 6]]
