import { setUpKeyDialog } from "./api.js";
import { setUpChat } from "./chat.js";
import { setUpLive } from "./live.js";
import { setUpSettings, setUpTheme, setUpViews } from "./settings.js";

setUpTheme();
setUpViews();
setUpKeyDialog();
setUpSettings();
setUpChat();
setUpLive();
