"""python -m turbojax: the console command."""

from turbojax.commands import main

if __name__ == "__main__":
    main()
