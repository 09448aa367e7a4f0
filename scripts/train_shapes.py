"""turbojax train_shapes, from the checkout: see --help and turbojax/app/commands/train_shapes.py."""

from turbojax.app.commands import run

if __name__ == "__main__":
    run("train_shapes")
