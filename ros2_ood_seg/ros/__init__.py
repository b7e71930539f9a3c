"""The only place that imports rclpy."""
