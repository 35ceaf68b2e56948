"""Files that are written aside and moved into place, so that no reader meets half of one."""
import contextlib
import os
import pathlib
import shutil



@contextlib.contextmanager
def written_aside(folder, last):
    """A folder to write into; afterwards its files are moved into `folder`, that of the name `last` after all others."""
    aside = pathlib.Path(folder) / ".saving"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    yield aside
    for file in sorted(aside.iterdir(), key=lambda file: file.name == last):
        os.replace(file, pathlib.Path(folder) / file.name)
    aside.rmdir()
