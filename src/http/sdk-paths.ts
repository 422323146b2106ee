/** The paths that Mixpanel's SDKs call, those included that the relay never serves. */
export const isSdkPath = (path: string): boolean =>
  /^\/(?:track|engage|groups|import|flags|settings|record)(?:\/|$)/.test(path)
