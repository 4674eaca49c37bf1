from pathlib import Path

import pytest

from serve_app.core.errors import ConfigError
from serve_app.hardware.cards import list_cards


def add_gpu(
    root: Path,
    card: int,
    address: str,
    *,
    vendor: str = "0x8086",
    device: str = "0x56a0",
    pci_class: str = "0x030000",
    driver: str | None = "xe",
    bar_bytes: int = 1 << 28,
) -> None:
    """Lay the files of one GPU as the kernel does."""
    pci = root / "sys/bus/pci/devices" / address
    (pci / "drm" / f"card{card}").mkdir(parents=True)
    (pci / "drm" / f"renderD{128 + card}").mkdir()
    for name, text in (("vendor", vendor), ("device", device), ("class", pci_class)):
        (pci / name).write_text(text + "\n")
    start = 0x4000000000
    rows = ["0x0 0x0 0x0", "0x0 0x0 0x0", f"{start:#x} {start + bar_bytes - 1:#x} 0x14220c"]
    (pci / "resource").write_text("\n".join(rows) + "\n")
    if driver:
        target = root / "sys/bus/pci/drivers" / driver
        target.mkdir(parents=True, exist_ok=True)
        (pci / "driver").symlink_to(target)
    drm = root / "sys/class/drm"
    (drm / f"card{card}").mkdir(parents=True)
    (drm / f"card{card}" / "device").symlink_to(pci)
    (drm / f"card{card}-DP-1").mkdir()  # a connector, which is no card


def test_cards_are_numbered_in_pci_order_and_integrated_ones_apart(tmp_path: Path) -> None:
    add_gpu(tmp_path, 0, "0000:83:00.0", device="0xe20b")
    add_gpu(tmp_path, 1, "0000:00:02.0", device="0x4680", driver="i915")
    add_gpu(tmp_path, 2, "0000:03:00.0", device="0x56a0", driver="i915")

    cards = list_cards(tmp_path, env={})

    assert [(c.index, c.name, c.pci_address, c.driver) for c in cards.discrete] == [
        (0, "Arc A770", "0000:03:00.0", "i915"),
        (1, "Arc B580", "0000:83:00.0", "xe"),
    ]
    assert [c.render_node for c in cards.discrete] == ["/dev/dri/renderD130", "/dev/dri/renderD128"]
    (integrated,) = cards.integrated
    assert integrated.is_integrated
    assert integrated.lock_name == "igpu-0"
    # Level Zero counts the integrated GPU too: it sits on the lowest bus.
    assert integrated.level_zero_index == 0
    assert [c.level_zero_index for c in cards.discrete] == [1, 2]
    assert [c.lock_name for c in cards.discrete] == ["arc-0", "arc-1"]


@pytest.mark.parametrize(
    "odd",
    [
        {"vendor": "0x10de"},
        {"pci_class": "0x020000"},
        {"driver": None},
        {"driver": "vfio-pci"},
    ],
)
def test_other_devices_are_no_cards(tmp_path: Path, odd: dict[str, str]) -> None:
    add_gpu(tmp_path, 0, "0000:03:00.0", **odd)

    assert list_cards(tmp_path, env={}).discrete == ()


def test_memory_comes_from_the_table_else_from_a_large_window(tmp_path: Path) -> None:
    add_gpu(tmp_path, 0, "0000:03:00.0", device="0xe20b")
    add_gpu(tmp_path, 1, "0000:04:00.0", device="0xffff", bar_bytes=16 << 30)
    add_gpu(tmp_path, 2, "0000:05:00.0", device="0xffff", bar_bytes=1 << 28)

    known, unknown_wide, unknown_narrow = list_cards(tmp_path, env={}).discrete

    assert (known.memory_bytes, known.bar_bytes) == (12 << 30, 1 << 28)
    assert unknown_wide.memory_bytes == 16 << 30
    assert unknown_narrow.memory_bytes == 0  # the window is not the memory when ReBAR is off


def test_a_machine_without_the_folder_has_none(tmp_path: Path) -> None:
    cards = list_cards(tmp_path, env={})

    assert (cards.discrete, cards.integrated) == ((), ())


def test_simulated_cards_replace_real_ones_of_their_kind(tmp_path: Path) -> None:
    add_gpu(tmp_path, 0, "0000:03:00.0")
    add_gpu(tmp_path, 1, "0000:00:02.0", driver="i915")

    cards = list_cards(tmp_path, env={"XERAY_SIMULATED_ARC_CARDS": "2"})

    assert [c.is_simulated for c in cards.discrete] == [True, True]
    assert [c.lock_name for c in cards.discrete] == ["arc-0", "arc-1"]
    assert [c.is_simulated for c in cards.integrated] == [False]
    assert list_cards(tmp_path, env={"XERAY_SIMULATED_ARC_CARDS": "0"}).discrete == ()


def test_a_count_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"XERAY_SIMULATED_ARC_CARDS: expected a whole number"):
        list_cards(tmp_path, env={"XERAY_SIMULATED_ARC_CARDS": "two"})
