import gc

from serve_app.core.garbage import freeze_started_objects


def test_what_was_made_before_is_not_walked_again():
    kept = [[] for _ in range(1000)]
    freeze_started_objects()
    try:
        assert gc.get_freeze_count() > len(kept)
        assert not any(found is kept for found in gc.get_objects())
    finally:
        gc.unfreeze()
