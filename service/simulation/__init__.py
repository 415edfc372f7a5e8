"""Virtual time: the scheduler that serves, on engines that only know what a step would take."""
