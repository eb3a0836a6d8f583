"""What tests share: real servers, and whatever else more than one test file needs."""
