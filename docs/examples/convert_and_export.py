"""Convert a published checkpoint to Orbax, and back byte for byte:
python docs/examples/convert_and_export.py CHECKPOINT [FOLDER]"""

import filecmp
import pathlib
import sys

from omni_jax.checkpoint.convert import convert, export


def main(checkpoint: str, folder: str = "out/converted") -> list[str]:
    place = pathlib.Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    convert(checkpoint, place / "orbax")  # any --model takes this folder; stock Orbax restores orbax/params
    export(str(place / "orbax"), place / "published")
    names = sorted(p.name for p in pathlib.Path(checkpoint).iterdir())
    equal, different, missing = filecmp.cmpfiles(checkpoint, place / "published", names, shallow=False)
    print(f"{len(equal)} of {len(names)} files are equal byte for byte")
    return different + missing


if __name__ == "__main__":
    sys.exit(bool(main(*sys.argv[1:3])))
