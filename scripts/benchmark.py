"""turbojax benchmark, from the checkout: see --help and turbojax/app/commands/benchmark.py."""

from turbojax.app.commands import run

if __name__ == "__main__":
    run("benchmark")
