"""`hvdkit doctor`: is this machine, or every host of a hostfile, ready to train? And `hvdkit env`."""
