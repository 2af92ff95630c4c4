from .separate import main

if __name__ == "__main__":
    main()
