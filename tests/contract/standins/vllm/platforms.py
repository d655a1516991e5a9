import os


class Platform:
    def is_cuda(self):
        return os.environ.get("STANDIN_GPU", "1") == "1"


current_platform = Platform()
