"""turbojax merge, from the checkout: see --help and turbojax/app/commands/merge.py."""

from turbojax.app.commands import run

if __name__ == "__main__":
    run("merge")
