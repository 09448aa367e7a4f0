"""turbojax evaluate, from the checkout: see --help and turbojax/app/commands/evaluate.py."""

from turbojax.app.commands import run

if __name__ == "__main__":
    run("evaluate")
