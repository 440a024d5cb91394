"""What a calibration says of how far it is."""

from __future__ import annotations

from nspo_lightning.callbacks.null_space.calibration_progress import calibration_progress


def test_batches_and_layers_are_counted(capsys):
    asked = []
    with calibration_progress(visible=True, ask=lambda: asked.append(1)) as report:
        for stage, total in (("batches", 2), ("batches", 1), ("layers", 3)):
            for done in range(total + 1):
                report(stage, done, total)
    said = capsys.readouterr().err
    assert "Calibrating, pass 1: 2 batches ..." in said
    assert "Calibrating, pass 2: 1 batch ..." in said
    assert "Making bases: 3 layers ..." in said
    assert len(asked) == 9
