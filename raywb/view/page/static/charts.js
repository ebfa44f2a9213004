export function useSource() {} export function themeChanged() {}
