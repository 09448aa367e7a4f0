"""turbojax train, from the checkout: see --help and turbojax/app/commands/train.py."""

from turbojax.app.commands import run

if __name__ == "__main__":
    run("train")
