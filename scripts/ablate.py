"""turbojax ablate, from the checkout: see --help and turbojax/app/commands/ablate.py."""

from turbojax.app.commands import run

if __name__ == "__main__":
    run("ablate")
