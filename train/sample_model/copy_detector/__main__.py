"""``python -m train.sample_model.copy_detector``."""

from train.sample_model.copy_detector.training import main

if __name__ == "__main__":
    main()
