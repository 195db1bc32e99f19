"""What tests share: tiny stock models and token files."""
